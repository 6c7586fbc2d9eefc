"""The score: the confusion matrix of the challenge, and tiles by class presence."""
