"""What pages of docs/ take from the code, a file for each kind of it."""
