"""What a step sees: data directories, their validation, and which utterances meet in a step."""
