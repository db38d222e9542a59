"""The verbs: each a signature that teaches, and one call into the library.

Their options are the fields of the dataclasses in config.py. Loaded when a verb is used, so that
`glassgpt --help` answers at once; cli.py says which verb stands in which file.
"""
