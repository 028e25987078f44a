"""Files at addresses, read by range."""
