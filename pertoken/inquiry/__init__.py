"""A finished run asked further questions: `kept` is what it left, `questions` are those that can be asked of a text,
`attribution` those that take the gradient of what a learned model reads,
`asking` puts them to a run folder, `told` says the answers in words; `credit_compare` credits its samples several ways.
"""
