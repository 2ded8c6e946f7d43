"""The commands behind ``tokenfab``: they parse, call and print; the rooms below them know nothing of them."""
