"""Other libraries' prefix files, read and written."""
