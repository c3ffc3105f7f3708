"""The only floor that imports ESPnet."""
