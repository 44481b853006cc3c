"""A checkpoint's files: where they lie, which are needed, how they become modules and modules become them."""
