"""How the figures are to be read: words, no numbers."""

READING = """
(to be written)
"""
