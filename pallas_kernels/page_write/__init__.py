"""New keys, values or scales into their places in a pool of pages."""
