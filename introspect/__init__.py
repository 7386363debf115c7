"""What AMD64, SVM and paging structures mean: pure functions over memory and registers."""
