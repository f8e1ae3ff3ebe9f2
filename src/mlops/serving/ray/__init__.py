"""A service as a Ray Serve application: several replicas on several machines behind one address."""

from mlops.serving.ray.deploy import Deployed, deploy, scale, status, undeploy

__all__ = ["Deployed", "deploy", "scale", "status", "undeploy"]
