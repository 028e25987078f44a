"""The pages here that are generated, and what generates them: `make docs`."""
