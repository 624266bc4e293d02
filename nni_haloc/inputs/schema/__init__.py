"""The sections of a run's settings, a file for each: keys, types, defaults and meanings."""
