"""`penstock prof …`: one file per verb."""
