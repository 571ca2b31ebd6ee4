"""The page that every command writes."""
