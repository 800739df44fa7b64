"""What a drafter's acceptance is made of, and what it would be in another shape."""
