"""The page in the browser that shows what happens inside a model, and the server behind it."""
