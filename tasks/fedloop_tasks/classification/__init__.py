"""Classification: a text gets one of a closed set of labels."""
