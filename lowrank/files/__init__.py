"""Write files and folders as one step, and read those of strangers without harm."""
