"""Our models written as files of other programs, where that takes more than NumPy."""
