"""What a reward is, and how named parts become the reward of every token.  (contract; being written)"""
