"""From a folder to a number: stages, launching, measuring."""
