"""What sharing is: plans, penalties' units, shared attention, materializing, exporting."""
