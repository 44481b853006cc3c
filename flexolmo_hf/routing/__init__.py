"""From text to router rows, and from private text to public text that looks like it."""
