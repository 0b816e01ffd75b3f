"""Music made by rule, with captions, tempo and key: training data whose labels are exact and whose rights are free."""
