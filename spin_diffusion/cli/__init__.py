"""Commands: from what a user types to the calls of the other rooms, and from an exception to one line."""
