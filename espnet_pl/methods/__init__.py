"""One method, one file: the directory listing is the registry."""
