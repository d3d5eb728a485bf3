"""Export trained weights to the formats of other libraries, each checked in that library. Read ``main.main`` first."""
