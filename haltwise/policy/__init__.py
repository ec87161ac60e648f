"""The policy: from what is seen of a thought to the decision whether it halts."""
