"""`penstock prof …`: one file per verb, registered in `verbs`."""
