"""What moves a bill: owning or renting, how sure a figure is, which input matters most."""
