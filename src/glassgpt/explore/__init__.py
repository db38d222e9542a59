"""The explorer: what a page in the browser asks about a model, and the server that answers."""
