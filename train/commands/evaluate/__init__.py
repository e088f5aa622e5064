"""`postshare evaluate`: models side by side."""
