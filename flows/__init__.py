"""WHEN stages run: Prefect's flows over the stages of dvc.yaml."""
