"""Weights from elsewhere: evaluated like a pretraining of ours (`evaluation`), and compared with what other programs make of them
(`conformance`, with the programs in `libraries`)."""
