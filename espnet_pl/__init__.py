"""Recipes and plugins for ESPnet that train speech recognisers on unlabelled speech."""

__version__ = "0.1.0"
