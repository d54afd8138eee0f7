"""Everything that happens while a bundle is made."""
