"""What a run needs on chips that are not there."""
