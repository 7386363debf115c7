"""SVM: world switch, intercepts, events."""
