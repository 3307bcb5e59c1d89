"""The planner's command for machines that are not at hand: whole steps of whole models. No torch."""
