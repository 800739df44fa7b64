"""Analysis of a drafter's acceptance, as it is and in other shapes."""
