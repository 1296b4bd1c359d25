"""The laws of the design as random programs, and the small world that they run in."""
