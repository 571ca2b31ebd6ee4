"""The teacher and the student of section 2.3."""
