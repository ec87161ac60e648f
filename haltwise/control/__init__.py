"""The production loop: audits tell what halting costs, and prices move to keep a promise."""
