"""What users call: one estimator, comparisons and searches of its candidates; what they take in, what they store."""
