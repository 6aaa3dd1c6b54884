"""`penstock store …`: one file per verb, registered in `verbs`."""
