"""Speed and memory against release 1.1.8 and against the bare cost of the bytes: `make bench`."""
