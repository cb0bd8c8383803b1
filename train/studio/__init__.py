"""The pages of `make studio`: data, train, runs, chat; everything they do is a command that they show."""
