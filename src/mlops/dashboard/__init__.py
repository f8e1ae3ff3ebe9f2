"""What an operator looks at: `grafana.json`, a dashboard of the metrics that a service exports."""
