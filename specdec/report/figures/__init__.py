"""The pictures, all in the style of `style.py`."""
