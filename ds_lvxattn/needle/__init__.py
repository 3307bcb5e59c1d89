"""The needle task and the small random models that learn it: data and models that need no download."""
