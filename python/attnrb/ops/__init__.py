"""Operations on plain tensors: attention with edited weights, its definition, and what both need.

Nothing here knows a policy or a model. `attnrb.functional` and `attnrb.reference` are the public names of what users
call.
"""
