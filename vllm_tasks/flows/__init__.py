"""Flows to deploy as they are; each is in a module of its name.

They are not imported here: a deployment's entry point names the module and the flow in it, such as
`vllm_tasks.flows.batch_predict.batch_predict`.
"""
